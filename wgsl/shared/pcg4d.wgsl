// A hash of four numbers: Jarzynski & Olano, JCGT 9(3), 2020.
fn pcg4d(numbers: vec4<u32>) -> vec4<u32> {
    var v = numbers * 1664525u + 1013904223u;
    v.x += v.y * v.w;
    v.y += v.z * v.x;
    v.z += v.x * v.y;
    v.w += v.y * v.z;
    v ^= v >> vec4<u32>(16u);
    v.x += v.y * v.w;
    v.y += v.z * v.x;
    v.z += v.x * v.y;
    v.w += v.y * v.z;
    return v;
}
