// Write the probabilities [tokens, vocabulary] that llama.cpp gives after each token of every FOLDER/NAME.gguf, as
// FOLDER/NAME.json, in the order of their names: node read_gguf.mjs NODE FOLDER TOKENS
import { readdirSync, writeFileSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [, , installed, folder, text] = process.argv;
const entry = path.join(installed, "node_modules/node-llama-cpp/dist/index.js");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry).href);
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error });
const input = JSON.parse(text).map((token) => [token, { generateNext: { probabilities: true } }]);
const files = readdirSync(folder).filter((name) => name.endsWith(".gguf"));
for (const file of files.sort()) {
    const model = await llama.loadModel({ modelPath: path.join(folder, file), gpuLayers: 0 });
    const context = await model.createContext({
        contextSize: 256,
        flashAttention: false,
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32",
    });
    const outputs = await context.getSequence().controlledEvaluate(input);
    const rows = outputs.map(({ next }) => {
        const row = new Array(next.probabilities.size);
        for (const [token, probability] of next.probabilities) row[token] = probability;
        return row;
    });
    writeFileSync(path.join(folder, file.replace(/gguf$/, "json")), JSON.stringify(rows));
    await context.dispose();
    await model.dispose();
}
process.exit(0);
