"""Commands that write what is made from the code: pictures, tables, counts, texts of configs."""
