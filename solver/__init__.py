"""The offline half: profiling, predictors and placement (later issues)."""
