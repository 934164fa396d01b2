"""What the quickstart needs and no user does: a small target made on the spot, and rows of its
words."""
