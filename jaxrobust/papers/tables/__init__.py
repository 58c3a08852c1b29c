"""The papers' tables as data, our records next to them, and how both are shown."""
