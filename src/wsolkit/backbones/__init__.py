"""timm networks, reduced to what localization methods need of them."""
