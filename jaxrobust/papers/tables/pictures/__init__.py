"""Pictures of the papers' tables, with ours in them."""
