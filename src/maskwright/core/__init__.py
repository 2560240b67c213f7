"""Mechanism only: tensors, masks, counts. Knows no model, no paper, no place."""
