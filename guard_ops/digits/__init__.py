"""The small real job: a flow on handwritten digits, its judges, its study of the objectives."""
