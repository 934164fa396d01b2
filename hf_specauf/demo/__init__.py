"""Models and data to try things on: a small target made on the spot and rows of its words, which
the quickstart uses, and a small real chat model."""
