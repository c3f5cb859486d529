"Reads everything from settings.ini; edit there, not here."
from configparser import ConfigParser
from pathlib import Path
import setuptools

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
c = config["DEFAULT"]
extras = {key.removesuffix("_requirements"): c[key].split() for key in c if key.endswith("_requirements")}

setuptools.setup(
    name=c["lib_name"], version=c["version"], description=c["description"], keywords=c["keywords"],
    author=c["author"], author_email=c["author_email"], license_expression="Apache-2.0",
    project_urls={"Source": c["git_url"], "Documentation": c["doc_host"] + c["doc_baseurl"],
                  "Changelog": c["git_url"] + "/blob/main/CHANGELOG.md", "Issues": c["git_url"] + "/issues"},
    classifiers=["Development Status :: 3 - Alpha", "Programming Language :: Python :: 3",
                 *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
                 "Intended Audience :: Science/Research", "Framework :: Jupyter", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=[*setuptools.find_packages(include=[c["lib_path"], c["lib_path"] + ".*"]), "gradnb.figure_notebooks"],
    package_dir={"gradnb.figure_notebooks": "nbs/figures"},      # a wheel brings the figure notebooks along
    package_data={"gradnb.show": ["*.mplstyle", "explorers/static/*"], "gradnb.figure_notebooks": ["*.ipynb"]},
    python_requires=">=" + c["min_python"], install_requires=c["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": c["console_scripts"].split()})
