"""What a mask, a delta or scores hold, as a table and as a picture."""
