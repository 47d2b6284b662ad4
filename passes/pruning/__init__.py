"""What must be removed together so that a tensor really gets smaller, and its removal."""
