"""Small models with trained weights, built from packages that are installed beside Roundhouse."""
