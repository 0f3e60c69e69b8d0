"""`ray job submit … -- python jobs/replicate.py`: the same as `medsae replicate`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("replicate")
