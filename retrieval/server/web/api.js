// Talks to the server: JSON in and out, the token where one is asked for, images as base64.

let token = sessionStorage.getItem("token") || "";

export class Refused extends Error {}

async function askForToken() {
  const dialog = document.getElementById("token");
  const field = document.getElementById("token-text");
  if (!dialog.open) dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  token = field.value.trim();
  field.value = "";
  sessionStorage.setItem("token", token);
}

async function request(path, options = {}) {
  for (;;) {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The server does not answer. Is it still running?");
    }
    if (answer.status !== 401) return answer;
    await askForToken();
  }
}

export async function get(path, signal) {
  return read(await request(path, { signal }));
}

export async function post(path, body, signal) {
  return read(await request(path, { method: "POST", body: JSON.stringify(body), signal }));
}

async function read(answer) {
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(body.error || `The server answered ${answer.status}.`);
  return body;
}

// An address that <img> can show; with a token the image is fetched here, since <img> sends none.
export async function imageURL(path) {
  if (!token) return path;
  const answer = await request(path);
  if (!answer.ok) throw new Refused("lost");
  return URL.createObjectURL(await answer.blob());
}

async function whole(path) {
  const answer = await request(path);
  if (!answer.ok) await read(answer); // says why
  return answer;
}

export async function imageBlob(path) {
  return (await whole(path)).blob();
}

// Makes a link to a file of the server work where a token is asked for, which links do not bring.
export function followWithToken(link) {
  link.addEventListener("click", async (event) => {
    if (!token || link.protocol === "blob:") return;
    event.preventDefault();
    const before = { href: link.href, download: link.download };
    try {
      const answer = await whole(link.href);
      const [, name] = answer.headers.get("Content-Disposition")?.match(/filename\*=UTF-8''(\S+)/) ?? [];
      const url = URL.createObjectURL(await answer.blob());
      link.href = url;
      if (link.hasAttribute("download") && name) link.download = decodeURIComponent(name);
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    } catch (error) {
      window.dispatchEvent(new CustomEvent("refused", { detail: error }));
    }
    link.href = before.href;
    if (link.hasAttribute("download")) link.download = before.download;
  });
}

const LARGE = 4 << 20; // bytes; a larger file is made smaller before it is sent
const SIDE = 1600; // pixels

export async function toBase64(blob) {
  if (blob.size > LARGE) {
    try {
      const bitmap = await createImageBitmap(blob);
      const scale = Math.min(1, SIDE / Math.min(bitmap.width, bitmap.height));
      const canvas = document.createElement("canvas");
      canvas.width = Math.round(bitmap.width * scale);
      canvas.height = Math.round(bitmap.height * scale);
      canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
    } catch {
      // a format that this browser cannot read: the server says what it takes
    }
  }
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Refused("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}
