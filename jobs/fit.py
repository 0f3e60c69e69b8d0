"""`ray job submit … -- python jobs/fit.py`: the same as `medsae fit`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("fit")
