// Numbers as people read them. What is not known is a dash.

const NONE = "–";

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 0.01) return `${Number((seconds * 1e3).toFixed(2))} ms`;
  if (seconds < 1) return `${significant(seconds * 1e3)} ms`;
  if (seconds < 120) return `${significant(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}

export function count(number) {
  if (number === null || number === undefined) return NONE;
  return number.toLocaleString("en");
}

export function rate(number) {
  if (number === null || number === undefined) return NONE;
  return number >= 1000 ? Math.round(number).toLocaleString("en") : significant(number);
}

export function percent(share) {
  if (share === null || share === undefined || Number.isNaN(share)) return NONE;
  return `${significant(100 * share)} %`;
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let at = 0;
  let left = number;
  while (left >= 1024 && at < units.length - 1) {
    left /= 1024;
    at += 1;
  }
  return `${at ? significant(left) : Math.round(left)} ${units[at]}`;
}

export function plural(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

/** Three digits that matter, and none behind a whole number of three. */
function significant(number) {
  if (number === 0) return "0";
  if (number >= 100) return Math.round(number).toLocaleString("en");
  return String(Number(number.toPrecision(3)));
}
