"""The stages: each reads committed tables of a run and commits one. Plumbing; arithmetic lives outside."""
