from setuptools import setup

NAME = "bev_perception"

setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/config", ["config/fastdds.xml"]),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="bevperception developers",
    maintainer_email="maintainers@example.com",
    description="Six cameras in, 3D boxes and BEV segmentation out: the ROS 2 node of bevperception",
    license="Apache-2.0",
    entry_points={"console_scripts": [f"node = {NAME}.main:main"]},
)
