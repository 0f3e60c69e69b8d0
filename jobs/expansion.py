"""`ray job submit … -- python jobs/expansion.py`: the same as `medsae expansion`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("expansion")
