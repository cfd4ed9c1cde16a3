"""One module for each table or figure."""
