from setuptools import setup

NAME = "bev_perception_bringup"

setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", ["launch/bev_perception.launch.py", "launch/replay.launch.py"]),
        (f"share/{NAME}/config", ["config/bev_perception.yaml"]),
        (f"share/{NAME}/rviz", ["rviz/bev_perception.rviz"]),
        (f"share/{NAME}/foxglove", ["foxglove/bev_perception.json"]),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="bevperception developers",
    maintainer_email="maintainers@example.com",
    description="Launch files, parameters, RViz and Foxglove layouts of bev_perception",
    license="Apache-2.0",
)
