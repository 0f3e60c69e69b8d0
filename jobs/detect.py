"""`ray job submit … -- python jobs/detect.py`: the same as `medsae detect`."""

from medsae_ray.cli import job

if __name__ == "__main__":
    job("detect")
