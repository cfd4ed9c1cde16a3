// Per-sample cross-entropy of one row (section 2.3). Included once per instruction set, inside its namespace.
