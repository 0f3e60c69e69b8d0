"""`ray job submit … -- python jobs/report.py`: the same as `medsae report`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("report")
