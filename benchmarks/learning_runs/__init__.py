"""What `learning.py` trains on, and the ways in which it trains."""
