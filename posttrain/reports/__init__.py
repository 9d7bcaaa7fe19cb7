"""What a trained thing is worth, as numbers, pictures and a page."""
