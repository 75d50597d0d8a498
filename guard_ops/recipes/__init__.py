"""Published settings, one YAML file for a backbone, and how they become a run."""
