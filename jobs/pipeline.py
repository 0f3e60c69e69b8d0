"""`ray job submit … -- python jobs/pipeline.py`: the same as `medsae pipeline`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("pipeline")
