"""The offline half: profiling, predictors and placement will live here."""
