"""The classroom: hand-outs from the exercises, and grading of what comes back. A thin layer over nbgrader.

    make release                                   # release/: student notebooks, and a zip of them
    make grade SUBMISSIONS=returned SEED=17        # grades/: grades.csv, feedback, a summary

`release.py` makes a course in nbgrader's own layout, `submissions.py` reads what students return, `sandbox.py` holds
their code, `run.py` grades one notebook in it, `grade.py` grades a folder, `report.py` writes what a teacher reads.
"""
