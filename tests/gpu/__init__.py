"""What is checked on a GPU: tests, measurements, and the steps of `scripts/check-gpu`.

All of it also runs on a CPU with starter models, so that no time on a GPU is lost to a mistake.
"""
