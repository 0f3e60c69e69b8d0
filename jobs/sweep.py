"""`ray job submit … -- python jobs/sweep.py`: the same as `medsae sweep`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("sweep")
