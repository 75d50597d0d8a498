"""The study: what of GRPO-Guard's claims holds on two small tasks; it writes docs/study.md."""
