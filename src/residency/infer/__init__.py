"""Faster and longer answers from the same weights: drafting ahead, keeping less."""
