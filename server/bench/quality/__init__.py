"""How good the answers of a model are, against references that anybody can check."""
