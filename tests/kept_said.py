"""Caches on disk of what the teachers of a tiny student say of batches."""

from mmkd.memory import Memory
from mmkd.store import Store


def keep(student, folder, batches, precision='fp32'):
    """Show batches to each teacher of a student and keep what they say.

    Args:
        student: A distiller whose teachers are loaded and have no cache.
        folder: Where to; each teacher gets one of its name in there.
        batches: As a data loader hands them over.
        precision: Of what is kept.
    """
    made = [student.data_preprocessor(one, True) for one in batches]
    for name, teacher in student.teachers.items():
        about = dict(
            teacher.about(), precision=precision, taps=list(teacher.paths)
        )
        store = Store(folder / name, 'test')
        store.begin(about, 2**26)
        teacher.memory = Memory(teacher.detector, 0, 'test', store)
        for one in made:
            teacher.run(one['inputs'], one['data_samples'], student._pixels)
        store.tell(dict(about, complete=True))
        store.close()
        teacher.memory = None
