"""What the cast to 16 bits must know: which nodes stay, which digits are lost, and the edits."""
