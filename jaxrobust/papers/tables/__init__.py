"""The papers' tables as data, and our records next to them."""
