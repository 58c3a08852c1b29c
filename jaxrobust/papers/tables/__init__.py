"""The papers' tables as data, our records beside them, and how both are shown."""
