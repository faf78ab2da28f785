// Pauses between tries.

/** Milliseconds. Longer with every failure, and jittered: many pages come back to one conductor. */
export function pauseAfter(failures, first, longest) {
  return Math.min(first * 2 ** (failures - 1), longest) * (0.5 + Math.random() / 2);
}

/** Throws the signal's reason when that comes first. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    signal.addEventListener("abort", stop, { once: true });
  });
}
