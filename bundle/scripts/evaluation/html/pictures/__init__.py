"""Pictures of where a case is wrong: which planes, and what is painted on them."""
