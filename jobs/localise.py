"""`ray job submit … -- python jobs/localise.py`: the same as `medsae localise`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("localise")
