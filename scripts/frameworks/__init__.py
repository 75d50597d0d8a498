"""What ``scripts/check_frameworks.py`` is made of: it runs on checkouts of the real frameworks."""
