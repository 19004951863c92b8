from setuptools import find_packages, setup
setup(package_dir={"prudent": "."}, packages=["prudent", *("prudent." + p for p in find_packages(include=["kernels*", "engine*", "rlhf*", "bench*"]))])
