"""The `hotcold` command: thin wrappers, one library call each."""
