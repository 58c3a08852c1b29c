"""Commands that generate files from the code: pictures, tables, counts, texts of configs."""
