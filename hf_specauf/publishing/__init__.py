"""What goes to the Hub, and comes from it: the staged folder, the card, and a look at it as a
stranger."""
