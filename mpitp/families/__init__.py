"""How the families of models on the hub name and lay out what the layers compute."""
