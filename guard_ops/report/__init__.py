"""``guard-ops report RUN...``: what happened in one or several runs, as a page to look at."""
