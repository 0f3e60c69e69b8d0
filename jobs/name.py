"""`ray job submit … -- python jobs/name.py`: the same as `medsae name`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("name")
