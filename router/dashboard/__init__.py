"""What a router shows of itself and its nodes: a page, and the figures behind it."""
