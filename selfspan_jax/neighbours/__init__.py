"""What spans are compared with, where it is more than a mask: other systems' ways to choose, weigh or compress what a token reads."""
